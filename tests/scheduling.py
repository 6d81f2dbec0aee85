"""How files are handed to the processes of `make test`, also when one of them dies.

xdist's own way (3.8.0, `--dist loadfile`) hands a dead process's files on whole. Those that were done give its
successor nothing to run, of which it tells nobody, and the run waits for ever; so does a successor that has one test
and awaits the next (pytest-dev/pytest-xdist#1323, #1327: mended there, not yet released). And the test that killed one
process would kill each of its successors (#1371). Here:

1. a process that dies leaves its files to the others without what is done, and without the test that it died in, which
   has failed;
2. who takes files takes two tests at least, for a process begins a test when it knows the next one.
"""

from __future__ import annotations

from xdist.scheduler import LoadFileScheduling
from xdist.workermanage import WorkerController

MIN_TESTS = 2


class FileScheduling(LoadFileScheduling):
    def remove_node(self, node: WorkerController) -> str | None:
        """Returns the test that was running, if any was."""
        files = self.assigned_work.pop(node)
        left = [(file, test) for file, tests in files.items() for test, is_done in tests.items() if not is_done]
        if not left:
            return None
        (_, running), *others = left
        for file, test in others:
            self.workqueue.setdefault(file, {})[test] = False
        return running

    def _reschedule(self, node: WorkerController) -> None:
        super()._reschedule(node)
        while self.workqueue and not node.shutting_down and self._pending_of(self.assigned_work[node]) < MIN_TESTS:
            self._assign_work_unit(node)
