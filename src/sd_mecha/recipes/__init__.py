"""Floor 1: what to compute. Nodes, walks over them, their `.mecha` text; opens no file, does no maths."""
