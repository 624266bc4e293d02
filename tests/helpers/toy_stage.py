"""A stage as another package may write it: round the weights to some digits."""

import torch
from torch import nn

from nni_haloc.inputs.schema.section import Section
from nni_haloc.runs.folder import Figures, RunFolder
from nni_haloc.runs.job import Job
from nni_haloc.runs.stages.stage import NetworkStage, Outcome, Report
from nni_haloc.space.modules import copy_of


class Rounding(Section):
    """The section ``round`` of the settings."""

    digits: int = 2


class Round(NetworkStage):
    """Round every weight of a copy of the network."""

    name = "round"
    settings = Rounding
    folder = title = "rounded"

    def apply(
        self, job: Job, before: Outcome, folder: RunFolder, report: Report, resume: bool
    ) -> tuple[nn.Module, Figures]:
        """Round to as many decimal digits as the settings say."""
        network, digits = copy_of(before.network), self.settings_of(job.config).digits
        with torch.no_grad():
            for weight in network.parameters():
                weight.copy_(weight.round(decimals=digits))
        return network, {"digits": digits}
