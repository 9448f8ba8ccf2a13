"""The command line of people who use the VPN, and `up`: a whole installation on one machine."""
