"""Release gate: decisions about claims, and audits of their evidence."""
