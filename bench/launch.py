"""torchrun for these scripts: it waits for a save, and ends as its ranks do, without a traceback.

    python -m bench.launch --nproc-per-node 2 train_hyper.py --stage finetune

takes all of torchrun's options and runs its code. What differs:
- SIGINT, SIGTERM and SIGHUP, once or more often, are one stop: the ranks get a SIGTERM, and as long
  as they need to save (torchrun kills them after 30 seconds, and on a second signal leaves them).
- The exit code is the ranks': 130 after a stop, 2 after a user's mistake, 1 after a crash. Nothing
  is printed beside what they print, but which of them was killed.
- --max-restarts is for crashes and killed ranks: a stop and a mistake of the user's end all.
- On one node the address is 127.0.0.1, so the host's name need not resolve.
- OMP_NUM_THREADS is as it was set, or an equal share of the cores, which torchrun makes 1.
"""
import contextlib
import logging
import os
import signal
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))  # started by path
from bench import early         # before PyTorch: Ctrl-C

from torch.distributed import run
from torch.distributed.elastic.multiprocessing import PContext, SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

import common
from common import UserError

STOPPED, MISTAKE, CRASHED = 130, 2, 1
FOREVER = 10 ** 7       # seconds


class Launcher:
    """One launch: whether it was asked to stop, and how its ranks ended.

    Within `watching`, PyTorch's handle of a node's processes, `PContext`, does as it says here.
    """

    def __init__(self, args):
        # Seconds; absent in PyTorch 2.11.
        self.patience = getattr(args, "shutdown_timeout", None)
        self.stops = []             # what asks for a stop; SLURM may be told to send SIGUSR1
        for name in args.signals_to_handle.split(","):
            number = getattr(signal, name.strip(), None)
            if number is None:
                raise UserError(f"--signals-to-handle: there is no {name}; name it as SIGTERM")
            if number != signal.SIGQUIT:
                self.stops.append(number)
        self.asked = False
        self.are_there = False      # whether ranks were started
        self.codes = {}             # local rank -> exit code, below 0 for a signal: of those that
                                    # ended before the others were ended, or else of all

    def __call__(self, number, frame) -> None:
        self.asked = True
        if not self.are_there:      # else `wait` sees it in a moment, where no process is half made
            raise KeyboardInterrupt

    @contextlib.contextmanager
    def watching(self):
        """Within: PContext's methods go through this launcher."""
        start, wait, close = PContext.start, PContext.wait, PContext.close

        def started(context):
            self.are_there, self.codes = True, {}
            start(context)

        def waited(context, *args, **kwargs):
            if self.asked:
                raise KeyboardInterrupt
            result = wait(context, *args, **kwargs)
            if result is not None and result.is_failed():
                tell_killed(self.codes)
                if code_of(self.codes) != CRASHED:  # all end, even if there are restarts left
                    raise ChildFailedError("ranks", result.failures)
            return result

        def closed(context, death_sig=None, timeout=30):
            if self.patience is not None:
                timeout = self.patience
            elif self.asked:
                timeout = FOREVER
            self.note_codes(context)
            close(context, death_sig, timeout)
            self.note_codes(context)

        PContext.start, PContext.wait, PContext.close = started, waited, closed
        try:
            yield
        finally:
            PContext.start, PContext.wait, PContext.close = start, wait, close

    def note_codes(self, context) -> None:
        """Of ranks that have ended, unless that was noted before."""
        if any(self.codes.values()):
            return
        for n, handler in getattr(context, "subprocess_handlers", {}).items():
            if handler.proc.poll() is not None:
                self.codes[n] = handler.proc.returncode

    def listen(self) -> None:
        """To what asks for a stop; nohup's SIGHUP stays ignored."""
        for number in self.stops:
            if signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, self)


def tell_killed(codes: dict[int, int]) -> None:
    """Which rank was killed: no one else says it."""
    for rank, code in sorted(codes.items()):
        if code < 0 and -code not in (signal.SIGTERM, signal.SIGINT):
            name = signal.Signals(-code).name
            print(f"error: rank {rank} was killed by {name} (out of memory?); the newest "
                  "checkpoint is as it was", file=sys.stderr, flush=True)


def code_of(codes: dict[int, int]) -> int:
    """The launch's exit code: where ranks differ, that of what went wrong first."""
    codes = set(codes.values()) - {0, -signal.SIGTERM, -signal.SIGINT}
    if codes - {STOPPED, MISTAKE}:      # the others' are what came of it
        return CRASHED
    if MISTAKE in codes:
        return MISTAKE
    return STOPPED


def prepare(argv: list[str] | None):
    """torchrun's options, with what is the same for all of our runs. Raises UserError."""
    args = run.parse_args(argv)
    try:
        _, nodes = run.parse_min_max_nnodes(args.nnodes)
        ranks = run.determine_local_world_size(args.nproc_per_node)
    except (ValueError, RuntimeError) as error:
        raise UserError(f"{error}; see --help") from None
    if not (args.module or args.no_python) and not os.path.isfile(args.training_script):
        raise UserError(f"{args.training_script}: no such script; the launcher's own options stand "
                        "before it")
    if nodes == 1:
        args.local_addr = args.local_addr or "127.0.0.1"
        # PyTorch 2.11 would take port 29500, which another run on this machine may have.
        if args.rdzv_backend == "static" and args.master_port in (None, 29500):
            args.standalone = args.standalone or not args.rdzv_endpoint
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // ranks)))
    return args


@common.command
def main(argv=None):
    args = prepare(argv)
    launcher = Launcher(args)
    launcher.listen()
    # That a rank failed, and that the others get a SIGTERM: the ranks have said why.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    logging.getLogger("torch.distributed.elastic.multiprocessing.api").setLevel(logging.CRITICAL)
    args.signals_to_handle = "SIGQUIT"                  # ends all at once
    try:
        with launcher.watching():
            run.run(args)
    except (KeyboardInterrupt, ChildFailedError):
        sys.exit(code_of(launcher.codes))
    except SignalException as quit:
        sys.exit(128 + quit.sigval)
    except (AssertionError, OSError, RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())[:150]
        raise UserError(f"the ranks cannot be started: {reason}; see --rdzv-endpoint, "
                        "--master-port and --local-addr") from None


if __name__ == "__main__":
    main()
