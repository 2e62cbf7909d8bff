"""How tokens travel from engine replicas to routers."""
