"""A lab: servers, virtual machines and host peers under one roof, and nothing left behind."""
