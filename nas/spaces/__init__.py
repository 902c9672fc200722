"""Search spaces as pure data: what can be chosen, and the rules between the choices."""
