"""NNI's multi-trial strategies through its training service, by the code of the page.

One in CI, the others in the slow suite, ``HALOC_SLOW=1``.
"""

import ast
import importlib
import os
import re
import shutil
import subprocess
import sys

import pytest
from helpers.nni_experiments import DIGITS, environment, free_port
from helpers.paths import ROOT

PAGE = ROOT / "docs" / "how-to" / "search-from-python.md"
SLOW = pytest.mark.skipif(not os.environ.get("HALOC_SLOW"), reason="slow: HALOC_SLOW=1 runs it")
SMALL = "RegularizedEvolution(population_size=2, sample_size=2)"
CHANGES = {
    "import RegularizedEvolution\n": "import TPE, Random, RegularizedEvolution\n",
    "trial_concurrency = 4, 1": "trial_concurrency = 2, 1",
    "    experiment.stop()": """    trials = experiment.list_trial_jobs()
    print([(trial.status, trial.finalMetricData[0].data) for trial in trials])
    experiment.stop()""",
}


@pytest.mark.parametrize(
    "strategy", [SMALL, *(pytest.param(name, marks=SLOW) for name in ("Random()", "TPE()"))]
)
def test_a_strategys_trials_score_the_networks_that_it_chose(tmp_path, monkeypatch, strategy):
    """Compare the best trial with the same network, scored in this process."""
    shutil.copy(DIGITS / "digits.safetensors", tmp_path)
    for name, code in re.findall(r"```python\n# (\w+\.py)\n(.*?)```", PAGE.read_text(), re.DOTALL):
        for old, new in {**CHANGES, SMALL: strategy, "8080": str(free_port())}.items():
            assert name != "search.py" or old in code
            code = code.replace(old, new)
        (tmp_path / name).write_text(code)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "search.py"],
        cwd=tmp_path,
        env=environment(tmp_path),
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    trials, best = (
        ast.literal_eval(line)
        for line in done.stdout.splitlines()
        if line.startswith(("[('", "{'"))
    )
    assert [status for status, _ in trials] == ["SUCCEEDED"] * 2
    monkeypatch.syspath_prepend(tmp_path)
    module = importlib.import_module("digits_space")
    scores = []
    monkeypatch.setattr(module.nni, "report_final_result", scores.append)
    module.score(module.DigitsSpace(str(tmp_path / "digits.safetensors")).freeze(best))
    assert scores == [pytest.approx(max(value for _, value in trials), abs=2e-3)]
    assert scores[0] > 0.5
