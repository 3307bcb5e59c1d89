"""The comparison of strategies: its runs and its report."""
