"""A search's page: not drawn yet."""


def page(answer):
    return "<html></html>"
