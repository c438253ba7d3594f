"""What a run leaves behind: event log, progress, results, tables and the report page."""

from stablekd_fast.report.events import NoRecorder, Recorder, read_events
from stablekd_fast.report.html import write_report, write_run_report
from stablekd_fast.report.machine import machine, versions
from stablekd_fast.report.results import read_results, summarise, write_results
from stablekd_fast.report.table import summary_rows, summary_table, summary_text

__all__ = [
    "NoRecorder",
    "Recorder",
    "machine",
    "read_events",
    "read_results",
    "summarise",
    "summary_rows",
    "summary_table",
    "summary_text",
    "versions",
    "write_report",
    "write_results",
    "write_run_report",
]
