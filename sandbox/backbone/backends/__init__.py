"""How the backbone is computed fast on each kind of device."""
