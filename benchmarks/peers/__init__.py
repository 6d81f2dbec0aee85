"""Other engines, in environments of their own: programs that read work from stdin and write times to stdout. They
import nothing of ours."""
