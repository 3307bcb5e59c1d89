"""The plan: what each attention layer exchanges under each strategy, and which strategy it runs with."""
