"""The run folder: written by `RunLog`, read by `RunReader`, made into one page by `write_report`."""

from pertoken.tracking.reader import RunReader
from pertoken.tracking.report import write_report
from pertoken.tracking.runlog import RunLog, episode_record

__all__ = ["RunLog", "RunReader", "episode_record", "write_report"]
