"""Many machines that come and go, one table: which worker gets which block, and what a fleet takes."""
