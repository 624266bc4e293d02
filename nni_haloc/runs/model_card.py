"""The page of a compressed network on the hub: what was measured, how to load and to repeat it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from nni_haloc.plan.rank_plan import RankPlan
from nni_haloc.runs.folder import Figures, RunFolder
from nni_haloc.runs.memory_format import Formats
from nni_haloc.runs.summary import cost_line, summary
from nni_haloc.utils.errors import needs
from nni_haloc.utils.files import read_json

HUB = {"what": "sharing networks on the hub", "install": "nni-haloc[hub]"}
"""What needs the package huggingface_hub, and how it is installed."""


def model_card(folder: str | Path, repo_id: str = "USER/NAME", license: str | None = None) -> str:
    """Write the page that presents a folder's network on the hub, in Markdown.

    Args:
        folder: a finished run's folder, one of its stages', or one of `Compressed.save`.
        repo_id: name of the repository on the hub, for the line that loads the network.
        license: short name of the network's licence, such as ``mit``; None leaves it out.

    Returns:
        The page, with the header that the hub reads.

    Raises:
        SettingsError: if a file of the folder is damaged.
        MissingPackage: if huggingface_hub is not installed.
    """
    with needs("huggingface_hub", **HUB):
        from huggingface_hub import ModelCard, ModelCardData

    facts = _Facts(RunFolder(folder))
    known: dict[str, Any] = {"eval_results": facts.results(), "model_name": repo_id}
    data = ModelCardData(
        library_name="nni-haloc",
        pipeline_tag="image-classification",
        tags=["nni-haloc", "model-compression", "low-rank", "tucker-decomposition"],
        license=license,
        **(known if known["eval_results"] else {}),
    )
    parts = [f"---\n{data.to_yaml()}\n---", f"# {repo_id.rpartition('/')[2]}"]
    parts += [facts.what(), facts.table(), facts.conditions(), facts.loading(repo_id)]
    parts += [facts.repeating(), facts.versions()]
    return str(ModelCard("\n\n".join(filter(None, parts)) + "\n"))


def without_folders(value: Any) -> Any:
    """Return settings with every absolute path cut to its last part.

    Where a user's files lie is nobody else's business, and of no use elsewhere.
    """
    if isinstance(value, dict):
        return {key: without_folders(item) for key, item in value.items()}
    if isinstance(value, list):
        return [without_folders(item) for item in value]
    if isinstance(value, str) and Path(value).is_absolute():
        return Path(value).name
    return value


class _Facts:
    """What a folder knows of its network; for a stage's, also what the run's folder knows."""

    def __init__(self, folder: RunFolder) -> None:
        self.own = folder.read_metrics()
        self.run = self.own
        if "original" not in self.own["stages"]:
            parent = RunFolder(folder.path.absolute().parent)
            self.run = parent.read_metrics() if parent.ranks.is_file() else self.own
        self.plan = RankPlan.load(folder.ranks)
        self.config = without_folders(self.run["config"])
        self.named = folder.model.is_file()
        self.name = read_json(folder.model).get("name") if self.named else None

    @property
    def networks(self) -> dict[str, Figures]:
        """Figures of the original network and of the folder's own."""
        stages = self.own["stages"]
        last = next(reversed(stages), "")
        own = stages.get("finetune") or ({} if last == "original" else stages.get(last, {}))
        return {"original": self.run["stages"].get("original", {}), "compressed": own}

    def section(self, name: str) -> dict[str, Any]:
        found = self.config.get(name)
        return found if isinstance(found, dict) else {}

    def what(self) -> str:
        network = f"The network `{self.name}`" if self.name else "A convolutional network"
        layers = "with low-rank layers (Tucker-2) in the place of some of its layers"
        lines = [f"{network}, {layers}, compressed by nni-haloc."]
        chosen = self.plan.chosen_by
        if {"rule", "metric", "budget", "cost", "original_cost"} <= {*chosen}:
            lines.append(f"Ranks were chosen by `{chosen['rule']}`: {cost_line(chosen)}.")
        return " ".join(lines)

    def table(self) -> str:
        headings, rows = summary(self.networks)
        if not rows:
            return ""
        lines = [headings, ["---"] * len(headings), *rows]
        return "\n".join(f"| {' | '.join(line)} |" for line in lines)

    def conditions(self) -> str:
        """Say which images top-1 is of, and what latency was measured with."""
        lines = []
        score = self.section("data").get("score", "val")
        images = self.networks["original"].get("images")
        if "top1" in self.networks["compressed"]:
            number = "" if images is None else f"{int(images):,} "
            lines.append(
                f"Top-1 is of {number}{'test' if score == 'test' else 'validation'} images."
            )
        timing = self.run.get("timing")
        if isinstance(timing, dict) and "latency_ms" in self.networks["compressed"]:
            plain = {key: value for key, value in timing.items() if not isinstance(value, dict)}
            listed = ", ".join(f"{key} {value}" for key, value in plain.items())
            lines.append(f"Latency is that of both networks in turn: {listed}.")
            if formats := Formats.of(timing.get("formats")):
                lines.append(f"By {formats}.")
        return " ".join(lines)

    def results(self) -> list[Any]:
        """Return top-1 as the hub lists it, where the data set has a name."""
        from huggingface_hub import EvalResult

        data, top1 = self.section("data"), self.networks["compressed"].get("top1")
        if top1 is None or not data.get("name"):
            return []
        return [
            EvalResult(
                task_type="image-classification",
                dataset_type=str(data["name"]),
                dataset_name=str(data["name"]),
                dataset_split="test" if data.get("score") == "test" else "validation",
                metric_type="accuracy",
                metric_value=top1,
            )
        ]

    def loading(self, repo_id: str) -> str:
        network = "" if self.named else ", model"
        remark = "" if self.named else "  # model: an instance of the original network"
        return (
            "## Load it\n\n```python\nimport nni_haloc\n\n"
            f'network = nni_haloc.from_pretrained("{repo_id}"{network}){remark}\n```\n\n'
            "It needs `pip install 'nni-haloc[hub]'`. The weights are a safetensors file, and no "
            "code of this repository is run."
        )

    def repeating(self) -> str:
        """Return the command that makes the network and its figures again."""
        call = self.run.get("call")
        if isinstance(call, str):
            return (
                "## Repeat it\n\n```python\nfrom nni_haloc import compress_model\n\n"
                f"result = {call}\nprint(result.report())\n```"
            )
        if not self.config:
            return ""
        settings = yaml.safe_dump(_given(self.config), sort_keys=False, allow_unicode=True)
        return (
            "## Repeat it\n\n```\nhaloc run run.yml --out FOLDER\n```\n\n"
            f"with `run.yml` (paths are cut to names):\n\n```yaml\n{settings}```"
        )

    def versions(self) -> str:
        listed = [f"{name} {version}" for name, version in self.run["versions"].items()]
        return f"Made with {', '.join(listed)}." if listed else ""


def _given(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings without what is not set."""
    return {
        key: _given(value) if isinstance(value, dict) else value
        for key, value in config.items()
        if value is not None and value != {}
    }
