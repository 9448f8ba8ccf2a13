"""What happened and others want to know: the outbox."""
