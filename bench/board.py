"""What a log holds, written for TensorBoard as well: --tensorboard, where that package is."""
import common
from common import UserError


def summary_writer():
    """PyTorch's class that writes TensorBoard's files. Raises UserError where that is missing."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise UserError("--tensorboard needs the package: pip install tensorboard; or leave it out "
                        "and draw the log: python -m bench.plot") from None
    return SummaryWriter


class Board:
    """The curves of a stage in its folder tensorboard, those of a group of teachers below it."""

    def __init__(self, folder: str):
        self.folder, self.writers = f"{folder}/tensorboard", {}         # group -> its writer

    def add(self, line: dict) -> None:
        """Add a log's line; of a step that is run once more, the later one counts."""
        step, group = line["step"], line.get("group", "")
        if group not in self.writers:
            folder = self.folder
            if group:                           # names of teachers: too many for that of a folder
                name = "".join(c if c.isalnum() else "_" for c in group[:40])
                folder += f"/group-{name}-{common.digest(group)[:6]}"
            # From this step on what an earlier run wrote, which was stopped, is not shown.
            self.writers[group] = summary_writer()(folder, purge_step=step)
        for name, value in line.items():
            if name != "step" and isinstance(value, (int, float)):
                self.writers[group].add_scalar(name, value, step)
        self.writers[group].flush()             # whoever is killed leaves what was logged

    def close(self) -> None:
        for writer in self.writers.values():
            writer.close()
