"""Races: many objectives under one budget, over several seeds at once."""
