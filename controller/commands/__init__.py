"""What an administrator can type beside the running controller."""
