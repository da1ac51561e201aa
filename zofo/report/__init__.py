"""A self-contained page and a table for the terminal, made from any run folders."""

from zofo.report.page import write_report as write_report
