"""The certificate as a person meets it: on the command line, in the run folder, on the page."""

import json

import pytest

from pertoken.cli import examining
from pertoken.config import load_config
from pertoken.doctor import CHECKS, crediting
from pertoken.errors import RunFolderError
from pertoken.tracking import RunLog, RunReader
from pertoken.tracking.certificate import Certificate, Line, read_certificate, write_certificate
from pertoken.tracking.report import render

SOUND = Line("ratio", "the ratio is 1", "pass", 1e-6, 1e-4, "nats", "96 tokens")
BROKEN = Line("eos", "the end is an action", "fail", 1.0, 0.0, "", "it is <masked>", "mend the mask")
SKIPPED = Line("kl_gradient", "the KL pulls back", "skipped", words="no KL penalty is configured")


def certificate(*lines, kind="quick", config="abc"):
    return Certificate(kind, "2026-01-02T03:04:05+00:00", {"torch": "2"}, {"precision": "float32", "device": "cpu"},
                       {"name": "tiny"}, config, 0.5, lines)  # fmt: skip


@pytest.fixture
def place(tmp_path, monkeypatch, model_folder):
    rows = [{"prompt": f"say {k}", "reference": f"the answer {k}"} for k in range(40)]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "recipe.yaml").write_text(
        f"policy: {{model: {model_folder}, precision: float32, device: cpu, compile: false}}\n"
        "task: {type: file, path: data.jsonl, prompt: '{prompt}:'}\n"
        "rollout: {prompts_per_step: 2, samples_per_prompt: 2, sampling: {max_new_tokens: 4}}\n"
        "rewards: [{name: length, min_words: 3}]\n"
        "evaluation: {items: 0}\nstop: {steps: 1}\nfolder: run\n"
    )
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_what_is_written_is_read_again_and_what_is_damaged_is_a_sentence(tmp_path):
    made = certificate(SOUND, BROKEN, SKIPPED)
    path = write_certificate(made, tmp_path)
    assert read_certificate(tmp_path) == made
    content = json.loads(path.read_text())
    assert (content["format_version"], content["passed"]) == (1, False)
    assert content["verdict"] == "1 of 3 checks failed: eos, 1 skipped"
    assert read_certificate(tmp_path / "elsewhere") is None
    for broken in ("{", "[]", '{"format_version": 1}', json.dumps(content | {"lines": [{"name": "x"}]})):
        path.write_text(broken)
        with pytest.raises(RunFolderError, match="is damaged"):
            read_certificate(tmp_path)
    path.write_text(json.dumps(content | {"format_version": 2}))
    with pytest.raises(RunFolderError, match="upgrade pertoken"):
        read_certificate(tmp_path)


def test_a_figure_that_is_not_finite_is_null(tmp_path):
    write_certificate(certificate(Line("ratio", "", "fail", float("inf"), 1e-4)), tmp_path)
    assert read_certificate(tmp_path).lines[0].figure is None


def test_a_full_one_keeps_its_lines_beside_newer_ones_of_the_same(tmp_path):
    full = certificate(SOUND, SKIPPED, kind="full")
    newer = certificate(BROKEN, Line("ratio", "the ratio is 1", "fail", 1.0, 1e-4))
    both = full.renewed(newer)
    assert both.kind == "full"
    assert {line.name: line.outcome for line in both.lines} == {
        "ratio": "fail",
        "kl_gradient": "skipped",
        "eos": "fail",
    }
    assert full.of_same(newer)
    assert not full.of_same(certificate(config="another"))


def test_doctor_then_train_keeps_one_certificate_with_the_run(place, pertoken):
    code, out, err = pertoken("doctor", "recipe.yaml")
    assert (code, err) == (0, "")
    assert f"all {len(CHECKS)} checks passed" in out
    assert "kept: run/certificate.json" in out
    for one in CHECKS:
        assert one.name in out
    assert read_certificate(place / "run").kind == "full"

    code, out, err = pertoken("train", "recipe.yaml")
    assert (code, err) == (0, "")
    kept = read_certificate(place / "run")
    assert kept.kind == "full"
    assert len(kept.lines) == len(CHECKS)
    assert f"{len(CHECKS)} checks passed" in (place / "run" / "report.html").read_text()

    code, out, _ = pertoken("doctor", "run")
    assert code == 0
    assert "full certificate of" in out
    code, out, _ = pertoken("doctor", "run", "--json")
    assert json.loads(out) == json.loads((place / "run" / "certificate.json").read_text())

    write_certificate(certificate(SOUND, BROKEN), place / "run")
    code, out, _ = pertoken("doctor", "run")
    assert code == 1
    assert "it is <masked>" in out
    assert "mend the mask" in out


def test_train_alone_makes_the_quick_part_and_tells_what_fails(place, pertoken, monkeypatch):
    own = crediting.credited
    monkeypatch.setattr(
        crediting, "credited", lambda settings, *rest: own(settings.model_copy(update={"gamma": 1.0}), *rest)
    )
    code, out, err = pertoken("train", "recipe.yaml")
    assert (code, err) == (0, "")
    assert "certificate: coefficients: no effect: credit.gamma. The setting that is named is read nowhere" in out
    kept = read_certificate(place / "run")
    assert [line.name for line in kept.lines] == [one.name for one in CHECKS if one.quick]
    assert [line.name for line in kept.failed] == ["coefficients"]

    code, out, _ = pertoken("doctor", "recipe.yaml", "stop.steps=2", "--only", "eos")
    assert code == 0
    assert "not kept: it is a part" in out
    assert read_certificate(place / "run") == kept


def test_a_run_of_another_configuration_keeps_its_own(place, pertoken):
    pertoken("train", "recipe.yaml")
    kept = (place / "run" / "certificate.json").read_bytes()
    assert examining._keep(certificate(SOUND, config="another"), load_config(["recipe.yaml"])).startswith(
        "not kept: run is"
    )
    assert (place / "run" / "certificate.json").read_bytes() == kept


def test_a_folder_without_a_certificate_says_how_to_make_one(place, pertoken):
    (place / "empty").mkdir()
    code, _, err = pertoken("doctor", "empty")
    assert code == 1
    assert "has no certificate. Make one: pertoken doctor empty/config.yaml" in err
    code, _, err = pertoken("doctor", "recipe.yaml", "--only", "seed")
    assert code == 2
    assert "did you mean 'seeds'?" in err


def test_the_page_shows_the_certificate_or_that_there_is_none(tmp_path):
    with RunLog.create(tmp_path / "run", config_text="", seed=0) as log:
        reader = RunReader(log.folder)
        assert "No certificate" in render(reader)
        write_certificate(certificate(SOUND, BROKEN, SKIPPED), log.folder)
        html = render(reader)
    assert "Not sound" in html
    assert "it is &lt;masked&gt;" in html
    assert "mend the mask" in html
    assert "no KL penalty is configured" in html
    assert "<masked>" not in html.partition("</main>")[0].replace("&lt;masked&gt;", "")
