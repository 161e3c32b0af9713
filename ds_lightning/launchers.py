"""Lightning's launchers, which also tell what was asked for as ``ckpt_path`` and pass signals on to the workers."""

from __future__ import annotations

import inspect
import os
import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import TYPE_CHECKING, Any

from lightning.pytorch.strategies.launchers.multiprocessing import _MultiProcessingLauncher
from lightning.pytorch.strategies.launchers.subprocess_script import _SubprocessScriptLauncher
from typing_extensions import override

if TYPE_CHECKING:
    from ds_lightning.strategy import DSSyncStrategy


class ScriptLauncher(_SubprocessScriptLauncher):
    """Runs the script once more for every other rank of this node; this process is rank 0."""

    def __init__(self, strategy: DSSyncStrategy) -> None:
        assert strategy.cluster_environment is not None
        super().__init__(strategy.cluster_environment, strategy.num_processes, strategy.num_nodes)
        self._strategy = strategy

    @override
    def launch(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        self._strategy.asked_for = _asked_for(function, args)
        return super().launch(function, *args, **kwargs)


class ProcessLauncher(_MultiProcessingLauncher):
    """Forks or spawns the ranks and waits for them. SIGTERM and SIGUSR1 to this process reach one of them meanwhile."""

    _strategy: DSSyncStrategy

    @override
    def launch(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        self._strategy.asked_for = _asked_for(function, args)
        self.procs = []
        handlers = []
        if threading.current_thread() is threading.main_thread():
            handlers = [_PassOn(signum, self) for signum in (signal.SIGTERM, signal.SIGUSR1)]
        try:
            return super().launch(function, *args, **kwargs)
        finally:
            for handler in handlers:
                handler.restore()

    @override
    def _wrapping_function(self, *args: Any, **kwargs: Any) -> None:
        for signum in (signal.SIGTERM, signal.SIGUSR1):
            handler = signal.getsignal(signum)
            if isinstance(handler, _PassOn):  # a forked worker has its parent's
                handler.restore()
        super()._wrapping_function(*args, **kwargs)


class _PassOn:
    """A handler that sends its signal to a worker: the workers agree on when to stop."""

    def __init__(self, signum: int, launcher: ProcessLauncher) -> None:
        self._signum, self._launcher = signum, launcher
        self._original = signal.getsignal(signum)
        signal.signal(signum, self)

    def __call__(self, signum: int, frame: FrameType | None) -> None:
        worker = next((p for p in self._launcher.procs if p.is_alive()), None)
        if worker is not None and worker.pid is not None:
            os.kill(worker.pid, signum)
        else:  # there are none yet, or no more
            self.restore()
            os.kill(os.getpid(), signum)

    def restore(self) -> None:
        signal.signal(self._signum, signal.SIG_DFL if self._original is None else self._original)


def _asked_for(function: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    """The `ckpt_path` that `fit`, `validate`, `test` or `predict` was called with; False if none, but a model."""
    try:
        given = inspect.signature(function).bind(*args).arguments
    except TypeError:
        return None
    asked = given.get("ckpt_path")
    return False if asked is None and given.get("model") is not None else asked
