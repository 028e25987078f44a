"""What configs are made of: keys and shapes of layers as functions of their sizes, other names for them, components."""
