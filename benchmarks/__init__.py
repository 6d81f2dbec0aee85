"""Every published figure is printed by a script here."""
