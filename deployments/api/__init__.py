"""The HTTP side: how each path is answered, in the format of the API that the client uses."""
