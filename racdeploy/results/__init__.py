"""The records of a report and of a search: data alone, which others fill in and print."""
