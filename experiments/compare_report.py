def write(plan):
    pass
