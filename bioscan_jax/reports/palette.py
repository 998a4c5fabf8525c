"""Colours that stay apart for eyes of every kind, on light paper and on a dark screen."""

TOP = 8
"""Names of a rank, or classes of a number, with a colour of their own; all others share one."""

# Sought so that any two differ by 19 (light) and 24 (dark) in CIELAB, to full colour vision and with protanopia,
# deuteranopia and tritanopia as Machado, Oliveira and Fernandes simulate them (2009, doi:10.1109/TVCG.2009.113)
LIGHT = ("#ff5500", "#9900ff", "#005577", "#00bbff", "#995533", "#ff9977", "#000055", "#550000")
LIGHT_OTHER, LIGHT_UNKNOWN = "#9a9a9a", "#cfcfcf"
DARK = ("#dd9900", "#dd99ff", "#339955", "#ffff99", "#bb0000", "#99ffdd", "#7700ff", "#9933bb")
DARK_OTHER, DARK_UNKNOWN = "#7d8288", "#42474d"

# Viridis without its ends, dark to light on paper and light to dark on a screen: the far end stands out
LIGHT_SCALE = ("#9fda3a", "#5ec962", "#35b779", "#1f9e89", "#26828e", "#31688e", "#3e4989", "#482878")
DARK_SCALE = ("#46327e", "#3f4f8c", "#34688e", "#28848e", "#1f9e89", "#44bf70", "#9bd93c", "#fde725")


def as_css(dark: bool) -> str:
    """The colours as custom properties."""
    taxa, scale = (DARK, DARK_SCALE) if dark else (LIGHT, LIGHT_SCALE)
    other, unknown = (DARK_OTHER, DARK_UNKNOWN) if dark else (LIGHT_OTHER, LIGHT_UNKNOWN)
    named = [f"--taxon-{k}: {color}" for k, color in enumerate(taxa)]
    named += [f"--scale-{k}: {color}" for k, color in enumerate(scale)]
    return "; ".join([*named, f"--other: {other}", f"--unknown: {unknown}"]) + ";"
