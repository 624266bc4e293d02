"""How pytest-xdist hands out tests; imported only where it is there."""

from xdist.scheduler import LoadScopeScheduling

from helpers.workers import group_of


class Groups(LoadScopeScheduling):
    """Hands out the groups in the order in which their tests are collected."""

    def __init__(self, config, log):
        config.option.loadscopereorder = False
        super().__init__(config, log)

    def _split_scope(self, nodeid):
        return group_of(nodeid)
