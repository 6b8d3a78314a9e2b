"""The run report: one page that shows what runs have measured. It needs nothing but a browser, and no network."""
