import numpy as np
import pytest

from emoshare.evaluation.ridge import ridge

PENALTIES = [0.1, 10.0, 1000.0]


def ridge_by_the_formula(train_inputs, train_shares, inputs, penalty):
    mean, deviation = train_inputs.mean(axis=0), train_inputs.std(axis=0)
    train_inputs, inputs = (train_inputs - mean) / deviation, (inputs - mean) / deviation
    offset = train_shares.mean(axis=0)
    gram = train_inputs.T @ train_inputs + penalty * np.eye(train_inputs.shape[1])
    return inputs @ np.linalg.solve(gram, train_inputs.T @ (train_shares - offset)) + offset


def draw(clips, inputs):
    rng = np.random.default_rng(0)
    drawn = rng.standard_normal((clips + 12, inputs)) * rng.uniform(0.1, 100, inputs) + 5
    return drawn[:clips], rng.random((clips, 3)), [drawn[clips : clips + 7], drawn[clips + 7 :]]


@pytest.mark.parametrize(("clips", "inputs"), [(60, 8), (20, 90)])
def test_all_penalties_are_solved_at_once_with_many_inputs_and_with_few(clips, inputs):
    train_inputs, shares, others = draw(clips, inputs)
    predicted = ridge(train_inputs, shares, others, PENALTIES)
    assert [of_entry.shape for of_entry in predicted] == [(3, 7, 3), (3, 5, 3)]
    for of_entry, rows in zip(predicted, others, strict=True):
        for number, penalty in enumerate(PENALTIES):
            expected = ridge_by_the_formula(train_inputs, shares, rows, penalty)
            np.testing.assert_allclose(of_entry[number], expected, atol=1e-8)


def test_a_share_that_is_not_known_leaves_its_clip_out_of_that_label_alone():
    train_inputs, shares, others = draw(40, 6)
    with_gaps = shares.copy()
    with_gaps[:9, 1] = np.nan
    with_gaps[:, 2] = np.nan
    (predicted, _) = ridge(train_inputs, with_gaps, others, [1.0])
    np.testing.assert_allclose(
        predicted[0, :, 0], ridge_by_the_formula(train_inputs, shares, others[0], 1.0)[:, 0], atol=1e-8
    )
    np.testing.assert_allclose(
        predicted[0, :, 1], ridge_by_the_formula(train_inputs[9:], shares[9:], others[0], 1.0)[:, 1], atol=1e-8
    )
    assert not predicted[0, :, 2].any()


def test_an_input_that_is_constant_in_training_does_no_harm():
    train_inputs, shares, others = draw(40, 6)
    constant = [np.append(rows, np.full((len(rows), 1), 3.0), axis=1) for rows in (train_inputs, others[0])]
    (predicted,) = ridge(constant[0], shares, constant[1:], PENALTIES)
    np.testing.assert_allclose(predicted, ridge(train_inputs, shares, others[:1], PENALTIES)[0], atol=1e-8)
