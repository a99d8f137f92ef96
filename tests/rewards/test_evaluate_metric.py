"""Metrics of the library evaluate, from scripts in a folder: nothing is downloaded."""

import sys
from importlib.util import find_spec

import pytest

from pertoken.errors import ConfigError, MissingExtraError, RewardError
from pertoken.rewards import EvaluateMetric

needs_evaluate = pytest.mark.skipif(not find_spec("evaluate"), reason="needs evaluate (the extra evaluate)")

SCRIPT = """
import datasets
import evaluate


class Metric(evaluate.Metric):
    def _info(self):
        features = datasets.Features({{"predictions": datasets.Value("string"), "references": {references}}})
        return evaluate.MetricInfo(description="", citation="", inputs_description="", features=features)

    def _compute(self, predictions, references, points=1.0):
        return {result}
"""
ONE, SEVERAL = 'datasets.Value("string")', 'datasets.Sequence(datasets.Value("string"))'
MATCH = '{"match": points * (predictions[0] == references[0])}'


@pytest.fixture(scope="session")
def modules(tmp_path_factory):
    """Where evaluate copies scripts to and imports them from: one place for a whole process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("evaluate.config.HF_MODULES_CACHE", str(tmp_path_factory.mktemp("modules")))
        yield


@pytest.fixture
def metric(tmp_path, modules):
    """Writes a metric and gives the path of its folder."""

    def of(references=ONE, result=MATCH, name="mine"):
        folder = tmp_path / name
        folder.mkdir()
        (folder / f"{name}.py").write_text(SCRIPT.format(references=references, result=result))
        return str(folder)

    return of


@needs_evaluate
def test_a_metric_in_a_folder_pays_the_last_action(metric, make_episode, make_scene, letters):
    scene = make_scene(make_episode(letters("abc"), "abc", id="0"), make_episode(letters("abd"), "abc", id="1"))
    reward = EvaluateMetric(metric(), settings={"points": 3.0})
    assert reward(scene)[:, 2:].tolist() == [[0, 0, 3], [0, 0, 0]]
    assert (
        EvaluateMetric(metric(name="other"), place="spread", settings={"points": 3.0})(scene)[0, 2:].tolist() == [1] * 3
    )


@needs_evaluate
def test_the_best_of_several_references_or_all_of_them_at_once(metric, make_episode, make_scene):
    scene = make_scene(make_episode("b", info={"references": ["a", "b"]}))
    assert EvaluateMetric(metric())(scene).sum() == 1
    count = EvaluateMetric(metric(SEVERAL, '{"count": len(references[0])}', "count"))
    assert count(scene).sum() == 2


@needs_evaluate
def test_a_result_is_chosen_by_its_key(metric, make_episode, make_scene):
    scene = make_scene(make_episode("a", "a"))
    folder = metric(result='{"f1": [0.25], "all": [1, 2]}')
    assert EvaluateMetric(folder, key="f1")(scene).sum() == 0.25
    with pytest.raises(RewardError, match=r"has no result 'metric'; set key to one of f1, all"):
        EvaluateMetric(folder)(scene)
    with pytest.raises(RewardError, match=r"all is \[1, 2\], expected a number"):
        EvaluateMetric(folder, key="all")(scene)


@needs_evaluate
def test_a_metric_that_cannot_be_reached_is_refused_with_what_to_do(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ConfigError, match=r"got '.*nowhere'.*from the Hugging Face hub.*path of a folder with it"):
        EvaluateMetric(str(tmp_path / "nowhere"))


def test_without_its_package_it_is_refused_with_the_remedy(monkeypatch):
    monkeypatch.setitem(sys.modules, "evaluate", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'pertoken\[evaluate\]'"):
        EvaluateMetric("exact_match")
