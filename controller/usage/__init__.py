"""Sessions, the usage ledger, and the limits of accounts."""
