"""Thresholds that keep their precision, the file that holds them, and what they are valid for."""

import dataclasses
import hashlib
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bioscan_jax import config
from bioscan_jax.barcodes.lineage import RANKS
from bioscan_jax.errors import InputError
from bioscan_jax.matching.calibration import (
    Calibration,
    Logistic,
    RankFit,
    answered,
    confidences,
    fit_logistic,
    fit_ranks,
    fit_threshold,
    from_json,
    novelty_threshold,
    rank_features,
    settings_binding,
    table_binding,
    to_json,
)
from bioscan_jax.matching.vote import Votes, Voting

FACTS = {"plan": "p", "weights_sha256": "w"}


def drawn(rows: int, seed: int, worst: float = 0.5) -> tuple[Votes, np.ndarray]:
    """Votes whose guesses are correct with the probability of their share, harder from rank to rank."""
    random = np.random.default_rng(seed)
    share = np.sort(random.uniform(worst, 1.0, (rows, len(RANKS))), axis=1)[:, ::-1].copy()
    right = random.random(share.shape) < share
    truth = np.zeros((rows, len(RANKS)), np.int32)
    taxa = np.where(right, 0, 1).astype(np.int32)
    near = np.exp(random.normal(-3.0, 0.5, share.shape))
    return Votes(taxa, share, near, near * 2, near[:, 0]), truth


def made(**changed) -> Calibration:
    ranks = tuple(RankFit(Logistic((1.0, -0.5, 0.25), 0.1 * i), None if i == 6 else 0.9) for i in range(len(RANKS)))
    fitted = Calibration(
        table=table_binding(FACTS, 3),
        settings=settings_binding(config.IdentifyConfig(), "exact", None),
        voting=Voting(power=8.0),
        ranks=ranks,
        novelty=Logistic((2.0,), -1.0),
        novelty_threshold=0.7,
        precision=0.95,
        risk=0.05,
        fitted_on={"rows": 10},
    )
    return dataclasses.replace(fitted, **changed)


def test_a_threshold_keeps_its_precision_with_the_stated_risk() -> None:
    """Of 400 draws, at most as many as 5 % and what chance adds (4 standard deviations) miss the precision."""
    missed = found = 0
    for seed in range(400):
        random = np.random.default_rng(seed)
        confidence = random.uniform(0.7, 1.0, 800)
        threshold = fit_threshold(confidence, random.random(800) < confidence, 0.9, 0.05)
        if threshold is not None:
            found += 1
            # The answers above t are right with the mean of a uniform draw from t to 1.
            missed += (1 + threshold) / 2 < 0.9
    assert found > 300
    assert missed <= 400 * 0.05 + 4 * np.sqrt(400 * 0.05 * 0.95)


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 300), st.floats(0.5, 0.99))
def test_every_threshold_passes_the_binomial_test(seed: int, rows: int, precision: float) -> None:
    from scipy.stats import binom

    random = np.random.default_rng(seed)
    confidence = random.uniform(0.5, 1.0, rows).round(2)  # with ties
    right = random.random(rows) < confidence
    threshold = fit_threshold(confidence, right, precision, 0.05)
    if threshold is not None:
        answers = confidence >= threshold
        assert binom.cdf(int((~right[answers]).sum()), int(answers.sum()), 1 - precision) <= 0.05


def test_no_threshold_where_few_rows_or_few_right_ones() -> None:
    assert fit_threshold(np.linspace(0, 1, 50), np.ones(50, bool), 0.95, 0.05) is None  # 59 right ones are needed
    assert fit_threshold(np.linspace(0, 1, 59), np.ones(59, bool), 0.95, 0.05) == 0.0
    assert fit_threshold(np.linspace(0, 1, 500), np.zeros(500, bool), 0.95, 0.05) is None
    assert fit_threshold(np.empty(0), np.empty(0, bool), 0.95, 0.05) is None


def test_ranks_are_answered_from_kingdom_down_and_keep_their_precision() -> None:
    ranks = fit_ranks(drawn(3000, 0), drawn(3000, 1), config.CalibrateConfig(precision=0.9))
    votes, truth = drawn(20_000, 2)
    confidence = confidences(ranks, votes)
    assert (np.diff(confidence, axis=1) <= 0).all()
    sure = answered(ranks, confidence)
    assert (sure[:, 1:] <= sure[:, :-1]).all()
    assert sure[:, 0].mean() > 0.5
    for rank in range(len(RANKS)):
        if sure[:, rank].sum() > 500:
            assert (votes.taxa[:, rank] == truth[:, rank])[sure[:, rank]].mean() >= 0.89


def test_a_blank_rank_lowers_nothing_below_it() -> None:
    ranks = tuple(RankFit(Logistic((0.0, 0.0, 0.0), bias), 0.6) for bias in (3.0, 3.0, 3.0, -9.0, 2.0, 2.0, 1.0))
    taxa = np.array([[0, 0, 0, -1, 0, 0, 0], [0, 0, 0, 0, 0, 0, 0], [0, 0, 0, -1, 0, -1, -1]], np.int32)
    ones = np.ones(taxa.shape)
    confidence = confidences(ranks, Votes(taxa, ones, ones, ones, np.ones(3)))
    assert ((confidence > 0) == (taxa >= 0)).all()
    assert confidence[0, 4] == pytest.approx(1 / (1 + np.exp(-2)))
    assert confidence[1, 4] == confidence[1, 3] < 0.01
    assert answered(ranks, confidence).tolist() == [
        [True, True, True, False, True, True, True],
        [True, True, True, False, False, False, False],
        [True, True, True, False, True, False, False],
    ]


def test_a_logistic_regression_recovers_its_coefficients() -> None:
    random = np.random.default_rng(0)
    features = random.normal(size=(20_000, 2)) * [1.0, 50.0] + [0.0, 7.0]
    chance = 1 / (1 + np.exp(-(features @ [2.0, -0.03] + 0.5)))
    fitted = fit_logistic(features, random.random(20_000) < chance)
    np.testing.assert_allclose(fitted.coefficients, [2.0, -0.03], rtol=0.1)
    assert fitted.bias == pytest.approx(0.5, abs=0.1)
    constant = fit_logistic(features[:9], np.ones(9, bool))
    np.testing.assert_allclose(constant(features), 9.5 / 10)


def test_rounding_errors_and_effects_of_the_wrong_sign_are_not_fitted() -> None:
    random = np.random.default_rng(0)
    strong = random.normal(size=400)
    yes = random.random(400) < 1 / (1 + np.exp(-2 * strong))
    noise = 9.2 + 1e-13 * np.where(yes, 1.0, -1.0)
    features = np.stack([strong, noise, random.normal(size=400) - yes], axis=1)
    assert fit_logistic(features, yes).coefficients[2] < -0.5
    fitted = fit_logistic(features, yes, (1, 1, 1))
    assert fitted.coefficients[1:] == (0.0, 0.0)
    alone = fit_logistic(features[:, :1], yes)
    assert (fitted.coefficients[0], fitted.bias) == pytest.approx((alone.coefficients[0], alone.bias), rel=1e-3)


def test_features_are_finite_where_nothing_was_found() -> None:
    nothing = np.full((2, len(RANKS)), -np.inf)
    votes = Votes(np.full((2, 7), -1, np.int32), np.zeros((2, 7)), nothing, nothing, np.full(2, np.inf))
    assert np.isfinite(rank_features(votes, 0)).all()


def test_the_novelty_threshold_is_conformal() -> None:
    scores = np.arange(1.0, 100.0)
    assert novelty_threshold(scores, 0.05) == 95.0
    assert novelty_threshold(scores[:18], 0.05) is None
    assert novelty_threshold(scores[:19], 0.05) == 19.0


def test_a_file_is_read_as_it_was_written() -> None:
    entries = (made(), made(novelty=None, novelty_threshold=None, voting=Voting(identity_weight=4.0, temperature=0.1)))
    assert from_json(to_json(entries), "x") == entries


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[:-20],
        lambda text: text.replace("0.95", "0.10"),
        lambda text: text.replace("calibration 4", "calibration 1"),
        lambda text: "[1, 2]",
        lambda text: "{}",
        lambda text: "\x00",
        lambda text: "[" * 200_000,
        lambda text: '{"sha256":' * 200_000,
        lambda text: json.dumps({"sha256": "0", "format": "bioscan_jax calibration 4", "calibrations": [{}]}),
    ],
)
def test_a_damaged_file_is_one_line(damage) -> None:
    with pytest.raises(InputError, match=r"^here is damaged or was edited .*run bioscan calibrate again$"):
        from_json(damage(to_json([made()])), "here")


def test_a_file_of_an_earlier_version_is_one_line_with_the_fix() -> None:
    """Format 1, whose vote had a power where this one has scores."""
    entry = {
        "table": table_binding(FACTS, 3),
        "settings": {"k": 50, "rerank": "alignment", "aligned": 32},
        "power": 8.0,
    }
    body = {"format": "bioscan_jax calibration 1", "calibrations": [entry | {"head_weight": 0.0}]}
    digest = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
    with pytest.raises(
        InputError, match=r"^here was fitted .*another version .*calibration 1.*run bioscan calibrate again$"
    ):
        from_json(json.dumps({"sha256": digest, **body}), "here")


def test_a_calibration_depends_only_on_settings_that_matter() -> None:
    plain = settings_binding(config.IdentifyConfig(), "exact", None)
    assert plain == settings_binding(
        config.IdentifyConfig(nprobes=7, refine_factor=3, aligned=5, processes=1), "exact", None
    )
    for changed in (
        settings_binding(config.IdentifyConfig(k=49), "exact", None),
        settings_binding(config.IdentifyConfig(rerank="alignment"), "exact", None),
        settings_binding(config.IdentifyConfig(filter="depth > 3"), "exact", None),
        settings_binding(config.IdentifyConfig(), "index", None),
        settings_binding(config.IdentifyConfig(), "exact", "heads"),
    ):
        assert changed != plain
    aligned = settings_binding(config.IdentifyConfig(rerank="alignment"), "exact", None)
    for changed in (
        config.IdentifyConfig(rerank="alignment", aligned=5),
        config.IdentifyConfig(rerank="alignment", identity_weight=4.0),
        config.IdentifyConfig(rerank="alignment", temperature=0.02),
    ):
        assert aligned != settings_binding(changed, "exact", None)
