"""How steps run: captured or eagerly, in which precision, in which memory, and for how long."""
