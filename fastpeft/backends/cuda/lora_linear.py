def can(meta):
    return "not yet"
