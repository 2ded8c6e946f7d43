"""The report: pages that work offline."""
