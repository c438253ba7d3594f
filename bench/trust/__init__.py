"""What a run survives: kills, refused writes, power loss, flipped bits, long use. `stablekd bench trust`."""
