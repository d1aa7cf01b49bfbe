"""Generative models of several graphs: components found in the model, joined with static shapes, exported as one bundle."""
