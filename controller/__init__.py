"""The central service: accounts, nodes, tunnels, and the public API over them."""
