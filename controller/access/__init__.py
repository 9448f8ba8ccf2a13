"""Which account may use which protocol: credentials, and what a client needs to connect by them."""
