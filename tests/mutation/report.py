def write_report(rooms):
    pass
