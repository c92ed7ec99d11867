"""Policies: how a layer's attention weights are edited. They know no model and no library that runs one."""
