"""RewardBench's weights, in both versions that published numbers were made with."""

import pytest

from lightning_modules.alignment.reward_bench import SUBSETS, aggregate, section_weights


def accuracies(**known: float) -> dict[str, float]:
    return dict.fromkeys(SUBSETS, 0.0) | {name.replace("_", "-"): value for name, value in known.items()}


@pytest.mark.parametrize("version", ["0.1.4", "0.1.2"])
def test_the_weights_of_a_section_are_its_examples(version):
    totals = {section: sum(weights.values()) for section, weights in section_weights(version).items()}
    assert totals == {"Chat": 358, "Chat Hard": 456, "Safety": 740, "Reasoning": 1968}


@pytest.mark.parametrize(("version", "safety"), [("0.1.4", 154 / 740), ("0.1.2", 250 / 740)])
def test_the_two_versions_differ_in_the_weights_of_xstest(version, safety):
    scores = aggregate(accuracies(xstest_should_refuse=1.0), version)
    assert scores["Safety"] == pytest.approx(safety)
    assert scores["Average"] == pytest.approx(safety / 4)


def test_mathematics_weighs_as_much_as_all_code():
    assert aggregate(accuracies(math_prm=1.0))["Reasoning"] == 0.5


def test_an_average_is_over_sections_not_over_examples():
    perfect = dict.fromkeys(section_weights()["Chat"], 1.0)
    assert aggregate(accuracies() | perfect)["Average"] == 0.25


def test_a_missing_or_unknown_subset_is_named():
    with pytest.raises(ValueError, match="hep-cpp is missing"):
        aggregate({name: 1.0 for name in SUBSETS - {"hep-cpp"}})
    with pytest.raises(ValueError, match="poems is no subset"):
        aggregate(accuracies(poems=1.0))
    with pytest.raises(ValueError, match=r"rewardbench 0\.2"):
        section_weights("0.2")
