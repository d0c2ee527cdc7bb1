"""Metrics for TensorBoard, beside metrics.jsonl."""

from support.files import InputError


def import_writer():
    """tensorboard's class SummaryWriter. InputError where tensorboard is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise InputError("--tensorboard: tensorboard is not installed; pip install tensorboard") from None
    return SummaryWriter


def flatten(row):
    """{name: number} of a line of metrics.jsonl, with a slash between the names of nested objects:
    {"held_out": {"accuracy": 1}} -> {"held_out/accuracy": 1}. What is no number is left out."""
    scalars = {}
    for name, value in row.items():
        if isinstance(value, dict):
            scalars |= {f"{name}/{inner}": number for inner, number in flatten(value).items()}
        elif isinstance(value, (int, float)):
            scalars[name] = value
    return scalars


class Scalars:
    """Writes the metrics of one stage into `folder` from step `first` on, in an event file each time that
    the stage starts. TensorBoard then hides what earlier tries wrote of these steps."""

    def __init__(self, folder, first):
        self.folder = folder
        self.first = first
        self.writer = None

    def add(self, row):
        """Writes a line of metrics.jsonl."""
        if self.writer is None:
            self.writer = import_writer()(str(self.folder), purge_step=self.first)
        for name, number in flatten(row).items():
            if name != "step":
                self.writer.add_scalar(name, number, row["step"])
        self.writer.flush()  # the process may be killed
