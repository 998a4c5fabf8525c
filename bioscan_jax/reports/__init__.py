"""A vector table as one page and a few pictures: gather, project, measure, draw."""
