"""What slots tell each other, through Redis: how long their queues are, and what another chunk would gain them."""
