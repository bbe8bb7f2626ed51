"""Examples of changing one function of a trainer."""
