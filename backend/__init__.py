"""Everything that runs inside the server: the supervisor, the three models, the engine."""
