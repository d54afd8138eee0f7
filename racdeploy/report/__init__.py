"""Print a report: Markdown for a pull request, a terminal, JUnit for a CI server, self-contained HTML.

The data are in :mod:`racdeploy.report.model`; nothing here measures or decides anything.
"""
