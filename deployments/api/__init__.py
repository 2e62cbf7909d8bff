"""The HTTP side: what each path is answered with, in the words of the API that was asked."""
